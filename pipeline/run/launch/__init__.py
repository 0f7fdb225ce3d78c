"""How ranks are started, found, watched and stopped."""
