"""The HTML page that shows a run, made from its folder alone. Never touches a device."""
