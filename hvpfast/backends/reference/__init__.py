"""The specification: torch.func, any dtype, any module, any loss."""
