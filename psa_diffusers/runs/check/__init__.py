"""`psa-generate --check`: what a machine and a model will get, said before any weights are downloaded."""
