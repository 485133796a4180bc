"""Files that a conversion copies into its output for transformers. The package never imports them."""
