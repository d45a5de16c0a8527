"""Files of rows, and the forms that rows have."""
