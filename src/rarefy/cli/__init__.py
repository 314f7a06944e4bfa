"""The command line. Importing it loads nothing heavy; every command imports what it needs when it runs."""
