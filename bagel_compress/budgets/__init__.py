"""Memory and time of a build on a target, predicted or measured."""
