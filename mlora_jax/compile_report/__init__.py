"""Reports the memory and time that training and generation take on TPUs, from the TPU's compiler, without a TPU."""
