"""SQL of the web tier: all tables in one place for the migrations, and the migrations."""
