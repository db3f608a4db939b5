"""What this project computes, inside other trainers. Each module imports its trainer when it is used."""
