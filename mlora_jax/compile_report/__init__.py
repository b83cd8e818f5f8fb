"""What training and generation take on TPUs, from the TPU's compiler and without a TPU."""
