"""Before anything is spent: is the recipe possible here, which steps are hits, what will each step need."""
