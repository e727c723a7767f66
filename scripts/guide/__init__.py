"""Makes docs/guide.md and its pictures: ``python -m scripts.guide`` from the project's folder."""
