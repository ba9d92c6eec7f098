"""The optimizers: which operator runs when. Nothing numeric lives here."""
