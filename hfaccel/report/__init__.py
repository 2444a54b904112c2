"""Reports for people, from the manifest alone: ``report.html``, ``report.md`` and ``README.md``."""
