"""A vision-language model as judge: which of two images of one prompt is better (docs/judge.md).

Read questions, rubric, backend (and its three kinds: server, local, reader), answer, asking,
statistics, page.
"""
