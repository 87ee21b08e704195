"""One module a training stage; each turns a recipe and photographs into a checkpoint directory."""
