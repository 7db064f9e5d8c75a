"""Planning a conversion and carrying it out."""
