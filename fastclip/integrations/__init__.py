"""fastclip's losses inside other libraries. Import the one you use: nothing here is imported by `import fastclip`."""
