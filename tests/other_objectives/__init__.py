"""Four objectives that the project does not know: each is one Python file and one YAML, and none touches src/."""
