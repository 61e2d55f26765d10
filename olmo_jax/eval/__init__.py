"""What a model knows: tasks, scores, perplexity by domain, a look inside, comparisons."""
