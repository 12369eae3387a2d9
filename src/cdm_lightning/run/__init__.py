"""A run on disk: may it be resumed with this configuration?"""
