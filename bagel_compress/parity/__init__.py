"""How far a build is from its reference, measured against a trace."""
