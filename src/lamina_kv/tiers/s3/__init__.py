"""Object stores: S3 and what speaks like it, Google's and Azure's, by ``obstore``.

===========  ======================================================================================
config.py    What is such a tier configured with?
client.py    How is a bucket reached through the library?
names.py     What are objects called?
store.py     How are chunks kept as objects, found and read, and what does each error mean?
errors.py    What does an error of the library say of the store?
listing.py   What is in a bucket, for a person?
===========  ======================================================================================
"""
