"""A vision-language model as judge: which of two images of one prompt is better (docs/judge.md)."""
