"""What is wanted: recipes, schemes and the evaluation matrix. Imports nothing heavy and nothing of ours."""
