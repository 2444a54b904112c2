"""The checkpoint that comes in: finding it, refusing what is unsafe or broken, its task, its torch model."""
