"""Settings of the server: its options, its configuration file, and the mistakes in them."""
