"""Writing an edited model in the formats others load."""
