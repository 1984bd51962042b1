"""Models of images: bidirectional, so without a state; asked by the names that timm's users know."""
