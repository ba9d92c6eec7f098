"""Training runs, tasks × optimizers × radii × seeds, and the rows that they give. Needs torch and scikit-learn."""
