"""How "auto" is answered: what ``use`` says, then the profiles of each layer, then a default."""
