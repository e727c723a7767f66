"""The groups of the corpus that the tests of documents share."""

LANGUAGES = ("de", "en", "fr")
