"""What finished and unfinished runs say, beside the paper: tables, figures, verdicts and a page. Needs no torch."""
