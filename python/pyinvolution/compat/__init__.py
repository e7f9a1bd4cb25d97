"""Stand-ins for modules of other implementations: code written against those runs after one import is changed."""
