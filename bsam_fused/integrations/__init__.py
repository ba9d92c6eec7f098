"""What trainers need to run every pass of a sharpness-aware step: mixins, which import no trainer themselves."""
