"""What takes torch: pruning, low rank, distillation, and the exporter of optimum-intel."""
