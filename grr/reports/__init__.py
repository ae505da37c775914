"""Reports: self-contained HTML pages, charts and tables."""
