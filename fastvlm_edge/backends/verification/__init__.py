"""How a new conversion and a new pair of engines are checked: stored pictures, a stored conversation, and the answers of a reference."""
