"""Where models and texts come from: the Hugging Face hub, downloads of single weight files, data sets."""
