"""What checkpoints call their tensors: tables that put other namings into diffusers' own."""
