"""Fine-tuning methods on several tasks and seeds: the comparison of the paper's tables, with error bars."""
