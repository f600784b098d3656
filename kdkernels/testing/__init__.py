"""What tests of the kernels share: tolerances with their reasons, cases with known answers."""
