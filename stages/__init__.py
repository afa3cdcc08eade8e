"""The seven stages and the reference images, one file each."""
