"""From the scores of the arms to figures: cells, intervals, comparisons, and what belongs beside them."""
