"""What the kernel counts: bytes of sockets and of interfaces."""
