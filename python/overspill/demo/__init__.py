"""``python -m overspill.demo``: a real model on real text, under half the memory it needs."""
