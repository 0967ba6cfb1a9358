"""What is shown: words, tables, statistics, figures, pages."""
