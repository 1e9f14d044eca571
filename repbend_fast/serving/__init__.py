"""A loaded model to be looked into, talked with, or asked by other people's programs: base and bent."""
