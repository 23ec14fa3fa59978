"""The migration daemon's package. It uses a mount as any program would; nothing of it exists yet but its place."""
