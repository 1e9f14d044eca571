"""What is measured: ops, the step, memory, the demo; what against; and faults that the tests have to notice."""
