"""What a network is: its specification, its module, how one is recognised, what is refused."""
