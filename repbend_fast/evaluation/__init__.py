"""Generation-based evaluation: greedy answers, a rule-based judge, and the rates before and after training."""
