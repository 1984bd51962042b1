"""Other projects' ways in: the only place where their names are imported. Each module needs its own package."""
